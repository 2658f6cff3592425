"""The record: experiments at full length, their receipts and the tables made from them."""
