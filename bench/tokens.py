"""An issuer of tokens on loopback, for a gateway with authentication."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

ISSUER, AUDIENCE, KEY_ID = "https://issuer.invalid", "bench", "key-1"
LIFETIME_S = 3600


@contextlib.contextmanager
def issuer() -> Iterator[tuple[dict[str, str], Callable[[str], str]]]:
    """Serve a key set; yields the settings of a gateway that trusts it, and who makes tokens."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    key_set = json.dumps({"keys": [{**public, "kid": KEY_ID, "alg": "RS256", "use": "sig"}]})

    def token(user: str) -> str:
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": user,
            "exp": int(time.time()) + LIFETIME_S,
            "projects": "*",
        }
        return jwt.encode(claims, key, "RS256", {"kid": KEY_ID})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(key_set)))
            self.end_headers()
            self.wfile.write(key_set.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            settings = {
                "AUTH_JWKS_URL": f"http://127.0.0.1:{server.server_port}/keys",
                "AUTH_ISSUER": ISSUER,
                "AUTH_AUDIENCE": AUDIENCE,
            }
            yield settings, token
        finally:
            server.shutdown()
            thread.join()
