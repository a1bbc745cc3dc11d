# SPDX-License-Identifier: Apache-2.0

"""Adapters of a denoiser: how the tuned model samples, and how it is kept."""
