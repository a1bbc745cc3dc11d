# SPDX-License-Identifier: Apache-2.0

"""The mathematics, on torch alone: schedules, targets, losses, acceptance, seeds."""
