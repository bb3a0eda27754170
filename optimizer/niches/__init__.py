"""What searches with archives share: breeding of vectors and of tables, competition for items, grids of niches."""
