"""Anthropic's ``/v1/messages``: the same chats and answers in another form.

request.py   a body, and the chat that it is
answer.py    an answer, whole or as events
"""
