"""What happens under attack, noise, shift or wrong labels: certified training, purification, adaptation at test time,
private inference and audits."""
