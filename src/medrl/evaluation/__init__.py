"""From a policy and examples to records, and from records to figures that carry their uncertainty."""
