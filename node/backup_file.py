"""The form of a backup: named files and the journal's entries, sealed with a passphrase.

scrypt makes the key; ChaCha20-Poly1305 seals pieces that know their number and which is the last, so that a
changed, cut or rearranged file is noticed. Knows no pod and no state directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

MAGIC = b"gpu-pod backup 1\n"
MAX_RECORD_BYTES = 256 << 20
_SALT_BYTES = 16
_PIECE_BYTES = 64 * 1024
_TAG_BYTES = 16
_NUMBER_BYTES = 11
_LENGTH_BYTES = 4
# 64 MiB and a fifth of a second for each guess of a passphrase.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**16, 8, 1


class BackupError(Exception):
    """The file is no backup, is damaged, or the passphrase is not its own; one line for people."""


class Kind(IntEnum):
    """What a record is. A file is its name, a zero byte and its content."""

    FILE = 1
    ENTRY = 2


Records = Iterable[tuple[Kind, bytes]]


def write(file: BinaryIO, passphrase: str, records: Records) -> None:
    salt = os.urandom(_SALT_BYTES)
    head = MAGIC + salt
    cipher = _cipher(passphrase, salt)
    file.write(head)
    waiting = bytearray()
    number = 0
    for kind, content in records:
        waiting += bytes([kind]) + len(content).to_bytes(_LENGTH_BYTES, "big") + content
        # The last piece is only known when all is said, so one piece always waits.
        while len(waiting) > _PIECE_BYTES:
            file.write(cipher.encrypt(_nonce(number, False), bytes(waiting[:_PIECE_BYTES]), head))
            del waiting[:_PIECE_BYTES]
            number += 1
    file.write(cipher.encrypt(_nonce(number, True), bytes(waiting), head))


def read(file: BinaryIO, passphrase: str) -> Iterator[tuple[Kind, bytes]]:
    """The records, each piece checked before anything of it is given out. Raises BackupError."""
    head = file.read(len(MAGIC) + _SALT_BYTES)
    if not head.startswith(MAGIC[:-2]):
        raise BackupError("this file is no backup of gpu-pod")
    if not head.startswith(MAGIC):
        raise BackupError("this backup is of another version of gpu-pod")
    if len(head) < len(MAGIC) + _SALT_BYTES:
        raise BackupError("this backup is cut short")
    waiting = bytearray()
    for piece in _pieces(file, _cipher(passphrase, head[len(MAGIC) :]), head):
        waiting += piece
        start = 0
        while (found := _record(waiting, start)) is not None:
            kind, content, start = found
            yield kind, content
        del waiting[:start]
    if waiting:
        raise BackupError("this backup ends within a record")


def _pieces(file: BinaryIO, cipher: ChaCha20Poly1305, head: bytes) -> Iterator[bytes]:
    sealed = file.read(_PIECE_BYTES + _TAG_BYTES)
    number = 0
    while True:
        following = file.read(_PIECE_BYTES + _TAG_BYTES)
        try:
            yield cipher.decrypt(_nonce(number, not following), sealed, head)
        except InvalidTag:
            if number == 0:
                raise BackupError("the passphrase is wrong, or the backup is damaged") from None
            raise BackupError("this backup is damaged or cut short") from None
        if not following:
            return
        sealed, number = following, number + 1


def _record(waiting: bytearray, start: int) -> tuple[Kind, bytes, int] | None:
    """The record at `start` and where the next begins; None while it is not all there."""
    begin = start + 1 + _LENGTH_BYTES
    if len(waiting) < begin:
        return None
    num_bytes = int.from_bytes(waiting[start + 1 : begin], "big")
    if num_bytes > MAX_RECORD_BYTES or waiting[start] not in tuple(Kind):
        raise BackupError("this backup holds what this gpu-pod does not know")
    if len(waiting) < begin + num_bytes:
        return None
    return Kind(waiting[start]), bytes(waiting[begin : begin + num_bytes]), begin + num_bytes


def _cipher(passphrase: str, salt: bytes) -> ChaCha20Poly1305:
    kdf = Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P)
    return ChaCha20Poly1305(kdf.derive(passphrase.encode()))


def _nonce(number: int, is_last: bool) -> bytes:
    """Never twice under one key: each file has a salt, and so a key, of its own."""
    return number.to_bytes(_NUMBER_BYTES, "big") + bytes([is_last])
