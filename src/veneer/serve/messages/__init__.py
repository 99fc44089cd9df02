"""Anthropic's API at ``/v1/messages``, which has another format for the same chats and answers.

request.py   the schema of a body, and its conversion to a chat request
answer.py    the format of an answer, complete or as a stream of events
"""
