"""Anthropic's API at ``/v1/messages``, which has another JSON format than OpenAI's chat API for the
same chats and answers.

request.py   the schema of a request body, and its conversion to a chat request of OpenAI's format
answer.py    the response body of an answer, or the events of a streamed answer
"""
