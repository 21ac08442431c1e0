"""AWS for the tests: moto's server under AWS's names, with the checks that moto lacks.

The script reaches it as it would reach AWS: by https, through the HTTP proxy that HTTPS_PROXY
names. There every request is held against what S3's documentation asks for; one that S3 would
refuse is answered as S3 would, and is a complaint that fails the test.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from .proxy import Answer, Exchange, Request, error_answer

REGION_HEADER = "x-amz-bucket-region"


@dataclass
class Upload:
    """A multipart upload: whether it was begun with CRC32, and the digests of its parts."""

    has_crc32: bool
    crc32s: dict[int, bytes] = field(default_factory=dict)


class AwsRules:
    """What S3 checks (`ask`, for a FaultProxy), and what it found wrong (`complaints`).

    `regions` has the region of each bucket. With `is_kms`, objects are encrypted by a key of the
    bucket's own, so that no ETag is an MD5.
    """

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.regions: dict[str, str] = {}
        self.uploads: dict[str, Upload] = {}
        self.checksums: dict[tuple[str, str], str] = {}
        self.is_kms = False

    def ask(self, exchange: Exchange, chunks: Iterable[bytes]) -> Answer:
        """Return the answer that S3 would give to a request with this body."""
        request, body = exchange.request, b"".join(chunks)
        if request.operation == "CreateBucket":
            found = re.search(rb"<LocationConstraint>(.*?)<", body)
            self.regions[request.bucket] = found[1].decode() if found else "us-east-1"
        region = self.regions.get(request.bucket)
        if region and signing_region(request) != region:
            return elsewhere(request, region)
        if refusal := self._refusal(request, body):
            self.complaints.append(f"{request}: {refusal}")
            return error_answer(400, refusal.split()[0], refusal)
        if self.is_kms and request.operation == "CompleteMultipartUpload":
            body = with_other_etags(body.decode()).encode()
        answer = exchange.ask_server([body])
        if answer.status == 200:
            self._take_note(request, body, answer)
        return answer

    def _refusal(self, request: Request, body: bytes) -> str | None:
        """The code and the words with which S3 would refuse a request, or None."""
        region, host = self.regions.get(request.bucket), request.host
        if region and f"s3.{region}." not in host and host != f"{request.bucket}.s3.amazonaws.com":
            return f"PermanentRedirect the bucket is in {region}, and the request came to {host}"
        if request.operation in ("PutObject", "UploadPart"):
            return self._refusal_of_body(request, body)
        if request.operation == "CompleteMultipartUpload":
            return self._refusal_of_complete(request, body)
        return None

    def _refusal_of_body(self, request: Request, body: bytes) -> str | None:
        md5 = hashlib.md5(body, usedforsecurity=False).digest()
        if request.headers["Content-MD5"] != base64.b64encode(md5).decode():
            return "BadDigest the Content-MD5 is not that of the body"
        crc32 = request.headers["x-amz-checksum-crc32"]
        if crc32 not in (None, crc32_of(body)):
            return "BadDigest the CRC32 is not that of the body"
        upload = self.uploads.get(request.query.get("uploadId", ""))
        if upload and upload.has_crc32 != (crc32 is not None):
            return "InvalidRequest a part has a CRC32 where its upload was begun with one"
        return None

    def _refusal_of_complete(self, request: Request, body: bytes) -> str | None:
        upload = self.uploads[request.query["uploadId"]]
        listed = re.findall(r"<Part>(.*?)</Part>", body.decode(), flags=re.DOTALL)
        numbers = [int(re.findall("<PartNumber>(.*?)<", part)[0]) for part in listed]
        if numbers != list(range(1, len(upload.crc32s) + 1)):
            return "InvalidPartOrder the parts are not all there in their order"
        for number, part in zip(numbers, listed, strict=True):
            crc32 = base64.b64encode(upload.crc32s[number]).decode()
            wanted = [crc32] if upload.has_crc32 else []
            if re.findall("<ChecksumCRC32>(.*?)<", part) != wanted:
                return f"InvalidPart part {number} should be listed with the CRC32 {wanted}"
        if request.headers.get("x-amz-checksum-type", "COMPOSITE") != "COMPOSITE":
            return "InvalidRequest the upload was begun with checksums that are COMPOSITE"
        return None

    def _take_note(self, request: Request, body: bytes, answer: Answer) -> None:
        """Remember what a request did, and make its answer what S3's would be."""
        name, text = request.operation, b"".join(answer.body).decode()
        upload = self.uploads.get(request.query.get("uploadId", ""))
        if name == "CreateMultipartUpload":
            has_crc32 = request.headers["x-amz-checksum-algorithm"] == "CRC32"
            (upload_id,) = re.findall("<UploadId>(.*?)<", text)
            self.uploads[upload_id] = Upload(has_crc32)
        elif name == "UploadPart":
            assert upload and request.part_number
            upload.crc32s[request.part_number] = zlib.crc32(body).to_bytes(4, "big")
        elif name == "ListParts" and upload and upload.has_crc32:
            text = self._with_listed_checksums(text, upload)
        elif name == "CompleteMultipartUpload" and upload and upload.has_crc32:
            checksum = self.checksums[request.bucket, request.key] = composite_crc32(upload)
            kind = "<ChecksumType>COMPOSITE</ChecksumType>"
            said = f"<ChecksumCRC32>{checksum}</ChecksumCRC32>{kind}"
            text = text.replace("</ETag>", f"</ETag>{said}")
        elif name == "HeadObject" and "x-amz-checksum-mode" in request.headers:  # noqa: SIM102
            if known := self.checksums.get((request.bucket, request.key)):
                answer.set_header("x-amz-checksum-crc32", known)
                answer.set_header("x-amz-checksum-type", "COMPOSITE")
        if self.is_kms and name not in ("HeadBucket", "CreateBucket"):
            text = with_other_etags(text)
            answer.set_header("x-amz-server-side-encryption", "aws:kms")
            for header, value in answer.headers:
                if header.lower() == "etag":
                    answer.set_header(header, other_digits(value))
        if request.method != "HEAD":
            answer.set_body(text.encode())

    @staticmethod
    def _with_listed_checksums(text: str, upload: Upload) -> str:
        """What ListParts says of an upload that was begun with CRC32."""
        text = re.sub("<Checksum.*?</Checksum[A-Za-z0-9]*>", "", text)

        def with_checksum(match: re.Match[str]) -> str:
            crc32 = base64.b64encode(upload.crc32s[int(match[1])]).decode()
            return f"{match[0]}<ChecksumCRC32>{crc32}</ChecksumCRC32>"

        text = re.sub("<PartNumber>(.*?)</PartNumber>", with_checksum, text)
        kinds = "<ChecksumAlgorithm>CRC32</ChecksumAlgorithm><ChecksumType>COMPOSITE</ChecksumType>"
        return text.replace("</UploadId>", f"</UploadId>{kinds}")


def elsewhere(request: Request, region: str) -> Answer:
    """S3's answer to a request that was signed for another region than the bucket's."""
    if request.method == "HEAD":
        return Answer(301, "Moved Permanently", [(REGION_HEADER, region)], [], 0)
    answer = error_answer(301, "PermanentRedirect", f"send it to s3.{region}.amazonaws.com")
    answer.set_header(REGION_HEADER, region)
    return answer


def signing_region(request: Request) -> str:
    """The region in the scope of a request's signature."""
    return str(request.headers["Authorization"]).split("/")[2]


def crc32_of(body: bytes) -> str:
    """The CRC32 of a body as S3's headers have it."""
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def composite_crc32(upload: Upload) -> str:
    """The CRC32 of an object that was sent in parts: of the CRC32s of its parts, one by one."""
    parts = b"".join(crc32 for _, crc32 in sorted(upload.crc32s.items()))
    return f"{crc32_of(parts)}-{len(upload.crc32s)}"


def with_other_etags(text: str) -> str:
    """A body whose ETags are others of the same form, as those under KMS; twice is once back."""
    return re.sub("<ETag>.*?</ETag>", lambda match: other_digits(match[0]), text)


def other_digits(etag: str) -> str:
    """An ETag of the same form that is no MD5 of the bytes; of that one, the ETag itself."""
    mirrored = str.maketrans("0123456789abcdef", "fedcba9876543210")
    return re.sub("[0-9a-f]{32}", lambda match: match[0].translate(mirrored), etag)
