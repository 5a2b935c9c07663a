"""Tests too long for every change: fuzzing, mutations, interventions, diffusers' own tests, other versions."""
