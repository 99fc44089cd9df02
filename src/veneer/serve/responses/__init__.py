"""OpenAI's API at ``/v1/responses``, which has another JSON format than OpenAI's chat API for the
same chats and answers.

    request.py   the schema of a request body, and its conversion to a request of the chat API
    answer.py    the response body of an answer, or the events of a streamed answer

The server stores no responses: a client sends the complete conversation each time.
"""
