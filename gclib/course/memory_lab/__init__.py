"""The memory lab of chapter 06."""
