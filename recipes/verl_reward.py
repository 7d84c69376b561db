"""The recipes' reward for verl, on rows that ``medrl export-data --to verl`` wrote: docs/scale.md has the command.

verl loads this file by its path and calls ``compute_score(data_source, solution_str, ground_truth, extra_info)``.
"""

from medrl.rewards import choice_correct, weighted, well_formed
from medrl.rewards.adapters import as_verl

compute_score = as_verl(weighted((1.0, choice_correct), (1.0, well_formed)))
