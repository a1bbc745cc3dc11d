# SPDX-License-Identifier: Apache-2.0

"""Measurements that help to choose a configuration."""
