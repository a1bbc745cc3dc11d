# SPDX-License-Identifier: Apache-2.0

"""Inverse noise correction: data inverted to noise, a corrector that learns it, and sampling from corrected noise."""
