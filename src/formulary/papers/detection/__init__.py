"""Finding, segmenting and tracking things in images, video, volumes and point clouds."""
