# SPDX-License-Identifier: Apache-2.0

"""The mathematics, on torch alone: noise schedules, targets, losses, acceptance, divergence, switch level, seeds."""
