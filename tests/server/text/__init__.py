"""Tests of what lies between ids and text."""
