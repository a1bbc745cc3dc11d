# SPDX-License-Identifier: Apache-2.0

"""A small real text-to-image model on emoji scenes, and the verifier that scores its images."""
