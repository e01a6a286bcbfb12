"""Which matrix gets which format: recipes by rule, and the choice under a budget of bytes."""

from reallm.allocate.budget import plan_for_bits
from reallm.allocate.plan import MatrixInfo, Plan, Planned
from reallm.allocate.recipe import Recipe, load_recipe, plan_from_recipe, recipe_of_plan, shipped_recipes
from reallm.allocate.solver import Candidate, choose

__all__ = [
    "Candidate",
    "MatrixInfo",
    "Plan",
    "Planned",
    "Recipe",
    "choose",
    "load_recipe",
    "plan_for_bits",
    "plan_from_recipe",
    "recipe_of_plan",
    "shipped_recipes",
]
