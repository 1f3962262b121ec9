"""One file a family of images; each registers itself (see `dpsyngen.programs.registry`)."""
