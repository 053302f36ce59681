"""The activation cache: what makes two stores the same, which store answers a request, and what one lends another."""
