# SPDX-License-Identifier: Apache-2.0

"""What keeps scripts written for TRL's DDPOTrainer running."""
