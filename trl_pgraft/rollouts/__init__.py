# SPDX-License-Identifier: Apache-2.0

"""From prompts to scored and selected samples."""
