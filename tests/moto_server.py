"""moto's server, with two differences from AWS KMS mended.

moto 5.2 ignores MessageType=DIGEST and hashes the digest once more, so that what cosign signs with KMS
would never verify; and its PSS salts are of the greatest length where AWS takes the digest's.
"""

import threading

from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from moto.kms.responses import KmsResponse
from moto.kms.utils import ECDSAPrivateKey, RSAPrivateKey
from moto.server import main

request = threading.local()


def remembering_message_type(operation):
    def wrapped(self):
        request.is_digest = self._get_param("MessageType") == "DIGEST"
        try:
            return operation(self)
        finally:
            request.is_digest = False

    return wrapped


def as_asked(algorithm):
    return Prehashed(algorithm) if getattr(request, "is_digest", False) else algorithm


def mend():
    KmsResponse.sign = remembering_message_type(KmsResponse.sign)
    KmsResponse.verify = remembering_message_type(KmsResponse.verify)

    # Private methods: their names are mangled with the class's.
    ecdsa_hash = ECDSAPrivateKey._ECDSAPrivateKey__hash_algorithm
    rsa_padding = RSAPrivateKey._RSAPrivateKey__padding_and_hash_algorithm

    def mended_hash(self, name):
        return as_asked(ecdsa_hash(self, name))

    def mended_padding(self, name):
        pad, algorithm = rsa_padding(self, name)
        if isinstance(pad, padding.PSS):
            pad = padding.PSS(mgf=padding.MGF1(algorithm), salt_length=algorithm.digest_size)
        return pad, as_asked(algorithm)

    ECDSAPrivateKey._ECDSAPrivateKey__hash_algorithm = mended_hash
    RSAPrivateKey._RSAPrivateKey__padding_and_hash_algorithm = mended_padding


if __name__ == "__main__":
    mend()
    main()
