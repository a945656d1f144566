"""From plans to the text of a package; knows no compiler."""
