"""What only the course needs: chapters, checks, labs, pictures, the capstone, experiments."""
