"""Assign a format to every matrix: recipes by rule, and bit allocation under a budget of bytes."""

from reallm.allocate.format_plan import MatrixInfo, Plan, PlanEntry
from reallm.allocate.problem import Choice, Problem
from reallm.allocate.recipe import Recipe, load_recipe, plan_from_recipe, recipe_of_plan, shipped_recipes

__all__ = [
    "Choice",
    "MatrixInfo",
    "Plan",
    "PlanEntry",
    "Problem",
    "Recipe",
    "load_recipe",
    "plan_from_recipe",
    "recipe_of_plan",
    "shipped_recipes",
]
