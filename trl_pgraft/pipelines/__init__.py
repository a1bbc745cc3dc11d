# SPDX-License-Identifier: Apache-2.0

"""How a diffusers pipeline is called, observed and replayed."""
