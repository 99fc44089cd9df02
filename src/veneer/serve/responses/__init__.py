"""OpenAI's ``/v1/responses``: the same chats and answers in another form.

    request.py   a body, and the chat that it is
    answer.py    an answer, whole or as typed events

Nothing is kept: a conversation is sent whole each time.
"""
