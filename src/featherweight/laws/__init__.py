"""Scaling laws of sparse and low-bit models: the forms, how they are fitted to runs, and what follows from them.

Imports no other room but `errors`; numpy and scipy come in only when something is computed.
"""
