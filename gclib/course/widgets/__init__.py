"""The widgets beside the memory lab, one a file, named after what they show; `base` is what all of them share."""
