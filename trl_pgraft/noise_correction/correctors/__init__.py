# SPDX-License-Identifier: Apache-2.0

"""The correctors of noise correction."""
