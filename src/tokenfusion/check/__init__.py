"""The data check-up: every image decoded once, and what is wrong with it in a report, as JSON and as a list to exclude.

checkup.py       the check-up from its beginning to its end
inspection.py    every image decoded once, by threads
duplicates.py    exact and near duplicates; lucas_kanade.py lays one thumbnail over another
labels.py        disputed labels, and classes that are empty, rare or differ between splits
crop.py          what resizing and cropping to the model's input cuts off
quarantine.py    which images had better be left out
report.py        check.html's values
"""
