"""Stage One: from pictures of the object and a sentence to its motion, seen from four sides."""
