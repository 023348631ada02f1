"""Large models started from smaller ones, by stacking, widening or adding parameters in steps."""
