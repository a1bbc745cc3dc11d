# SPDX-License-Identifier: Apache-2.0

"""Classes and data of TRL's DDPO, for scripts that were written for it."""
