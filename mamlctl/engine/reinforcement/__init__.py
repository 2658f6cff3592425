"""Reinforcement learning: trajectories, advantages, policy gradients and trust regions."""
