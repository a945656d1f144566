"""Families of kernels: how each contraction of a layer is computed, and what that costs.

``family.py`` says what a family is, ``registry.py`` lists all of them. A family is one folder or
file here (its schedules, the reasons why some cannot be, and what its templates are given) and one
folder of templates.
"""
