"""What the pages share: state, forms, drawings. Nothing in here is a page."""
