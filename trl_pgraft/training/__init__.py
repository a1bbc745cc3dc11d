# SPDX-License-Identifier: Apache-2.0

"""From selected samples to an adapter."""
