"""Complete networks for images, audio or plain vectors, built at the sizes their papers name and trained as a whole."""
