"""A release as a pipeline of diffusers, with code that needs no dpsyngen."""
