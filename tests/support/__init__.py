"""What tests share: tiny models, fake servers, cases."""
