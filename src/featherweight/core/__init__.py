"""The mathematics: layer problems, rules, solvers and solutions. Imports torch and nothing else of ours."""
