"""An HTTP server that speaks OpenAI's audio API. It needs the extra ``serve``; only ``command`` imports without it.

``app`` has the routes, ``service`` what they share, ``speech`` one request from the engine to the socket, ``voices``
the voices on disk, ``limits`` what is checked before a route is reached, and ``server`` the process: sockets, signals,
draining. The WebSocket is ``socket``, with its ``messages`` and ``turns``; ``pages`` serves the web page in ``static``.
The audio formats are in ``csm.formats``.
"""
