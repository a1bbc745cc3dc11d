# SPDX-License-Identifier: Apache-2.0

"""Cards, and pushes to the Hub."""
