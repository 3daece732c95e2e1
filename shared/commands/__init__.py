"""Commands that belong to no stage. Their modules import nothing heavy at the top."""
