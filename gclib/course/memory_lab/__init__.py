"""The memory lab of chapter 06: what it knows (`answers`) and advises (`advice`), the step itself (`run`), how the lab
draws (`picture`) and the controls that hold them together (`widget`)."""
