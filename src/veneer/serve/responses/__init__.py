"""OpenAI's API at ``/v1/responses``, which has another format for the same chats and answers.

    request.py   the schema of a body, and its conversion to a chat request
    answer.py    the format of an answer, complete or as a stream of typed events

The server stores no responses: a client sends the complete conversation each time.
"""
