"""The published vectors, both ways: RFC 3602, 3686, 4106 and 4543 (draft-mcgrew-gcm-test), and 7634."""

from __future__ import annotations

import hashlib
import hmac
from functools import partial
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from natcompat.esp.engine import packet
from natcompat.esp.engine.crypto import make_cipher
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Dropped, Opened, Reason
from natcompat.ipsec import Direction, TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ, Key
from tests.support.esp import OUTER, native_providers, policy, sa


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


class AeadVector(NamedTuple):
    key: str
    nonce: str
    """Salt and IV."""
    plaintext: str
    associated: str
    ciphertext: str
    tag: str


# draft-mcgrew-gcm-test-01, section 4, in its order
GCM = [
    AeadVector(
        "4c80cdefbb5d10da906ac73c3613a634",
        "2e443b684956ed7e3b244cfe",
        "45000048699a000080114db7c0a80102c0a801010a9bf15638d301000001000000000000045f736970045f756470037369"
        "700963796265726369747902646b000021000101020201",
        "000043218765432100000000",
        "fecf537e729d5b07dc30df528dd22b768d1b98736696a6fd348509fa13ceac34cfa2436f14a3f3cf65925bf1f4a13c5d15"
        "b21e1884f5ff6247aeabb786b93bce61bc17d768fd9732",
        "459018148f6cbe722fd04796562dfdb4",
    ),
    AeadVector(
        "feffe9928665731c6d6a8f9467308308",
        "cafebabefacedbaddecaf888",
        "4500003e698f000080114dccc0a80102c0a801010a980035002a2343b2d001000001000000000000037369700963796265"
        "726369747902646b00000100010001",
        "0000a5f80000000a",
        "deb22cd9b07c72c16e3a65beeb8df304a5a5897d33ae530f1ba76d5d114d2a5c3de81827c10e9a4f51330d0eec416642cf"
        "bb85a5b47e48a4ec3b9ba95d918bd1",
        "83b70d3aa8bc6ee4c309e9d85a41ad4a",
    ),
    AeadVector(
        "abbccddef00112233445566778899aababbccddef00112233445566778899aab",
        "112233440102030405060708",
        "4500003069a6400080062690c0a801029389155e0a9e008b2dc57ee0000000007002400020bf0000020405b40101040201"
        "020201",
        "4a2cbfe300000002",
        "ff425c9b724599df7a3bcd510194e00d6a78107f1b0b1cbf06efae9d65a5d763748a637985771d347f0545659f14e99def"
        "842d8e",
        "b335f4eecfdbf831824b4c4915956c96",
    ),
    AeadVector(
        "00000000000000000000000000000000",
        "000000000000000000000000",
        "4500003c99c500008001cb7a40679318010101010800075c020044006162636465666768696a6b6c6d6e6f707172737475"
        "767761626364656667686901020201",
        "0000000000000001",
        "4688daf2f973a392732909c331d56d60f694abaa414b5e7ff5fdcdfff5e9a284456476492719ffb64de7d9dca1e1d894bc"
        "3bd57873ed4d181d19d4d5c8c18af3",
        "f821d496eeb096e98ad2b69e4799c71d",
    ),
    AeadVector(
        "3de09874b388e6491988d0c3607eae1f",
        "57690e434e280000a2fca1a3",
        "4500003c99c300008001cb7c40679318010101010800085c020043006162636465666768696a6b6c6d6e6f707172737475"
        "767761626364656667686901020201",
        "42f67e3f1010101010101010",
        "fba2caa4853cf9f0f22cb10d86dd83b0fec75691cf1a04b00d1138ec9c35791765acbd8701ad79845bf9fe3fba487bc917"
        "55e6662b4c8d0d1f5e22739530320a",
        "e0d731cc978ecafaeae88f00e80d6e48",
    ),
    AeadVector(
        "3de09874b388e6491988d0c3607eae1f",
        "57690e434e280000a2fca1a3",
        "4500001c42a200008001441f406793b6e00000020a00f5ff01020201",
        "42f67e3f1010101010101010",
        "fba2ca845e5df9f0f22c3e6e86dd831e1fc65792cd1af9130e1379ed",
        "369f071f35e034be95f112e4e7d05d35",
    ),
    AeadVector(
        "feffe9928665731c6d6a8f9467308308feffe9928665731c",
        "cafebabefacedbaddecaf888",
        "45000028a4ad4000400678800a01038f0a010612802306b8cb712602dd6bb03e501016d075680001",
        "0000a5f80000000a",
        "a5b1f8066029aea40e598b8122de02420938b3ab33f828e687b8858b5bfbdbd0315b27452144cc77",
        "95457b9652037f5318027b5b4cd7a636",
    ),
    AeadVector(
        "abbccddef00112233445566778899aab",
        "decaf888cafedebaceface74",
        "4500004933ba00007f119106c3fb1d10c2b1d326c02831ce0035dd7b800302d500004e20001e8c18d75b81dc91baa0476b"
        "91b924b280389d92c963bac046ec959b6266c04722b14923010101",
        "000001000000000000000001",
        "18a6fd42f72cbf4ab2a2ea901f73d814e3e7f243d95412e1c349c1d2fbec168f9190feebaf2cb01984e65863965d7472b7"
        "9da345e0e780191f0d2f0e0f496c226f2127b27db35724e7845d68",
        "651f57e65f354f75ff17015769623436",
    ),
    AeadVector(
        "abbccddef00112233445566778899aababbccddef00112233445566778899aab",
        "73616c74616e640169766563",
        "45080028732c00004006e9f90a0106120a01038f06b88023dd6bafbecb71260250101f646d540001",
        "17405e67156f3126dd0db99b",
        "f2d69ecdbd5a0d5b8d5ef38bad4da58d1f278fde98ef67549d524a3018d9a57ff4d3a31ce673119e",
        "451626c2415771e3b7eebca614c89b35",
    ),
    AeadVector(
        "3de09874b388e6491988d0c3607eae1f",
        "57690e434e280000a2fca1a3",
        "45000049333e00007f119182c3fb1d10c2b1d326c02831ce0035cb458003025b000001e0001e8c18d65759d52284a0352c"
        "71475c8880391c764d6e5ee0496b325ae270c03899493915010101",
        "42f67e3f1010101010101010",
        "fba2cad12fc1f9f00d3cebf305410db83d7784b607323d220f24b0a97d54182800cadb0f68d99ef0e0c0c89ae9bea8884e"
        "52d65bc1afd0740f742444747b5b39ab533163aad4550ee5160975",
        "cdb608c5769189609763b8e18caa81e2",
    ),
    AeadVector(
        "abbccddef00112233445566778899aababbccddef00112233445566778899aab",
        "73616c74616e640169766563",
        "636973636f0172756c657301746865016e6574776501646566696e6501746865746563686e6f6c6f676965730174686174"
        "77696c6c01646566696e65746f6d6f72726f7701020201",
        "17405e67156f3126dd0db99b",
        "d4b7ed86a1777f2ea13d6973d324c69e7b43f826fb56831226508bebd2dceb18d0a6df10e5487df074113e14c641024e3e"
        "6773d91a62ee429b043a10e3efe6b012a49363412364f8",
        "c0cac587f249e56b11e24f30e44ccc76",
    ),
    AeadVector(
        "7d773d00c144c525ac619d18c84a3f47",
        "d966426743457e9182443bc6",
        "01020201",
        "335467aeffffffff",
        "437f866b",
        "cb3f699fe9b0822bac961c4504bef270",
    ),
    AeadVector(
        "abbccddef00112233445566778899aab",
        "decaf888cafedebaceface74",
        "746f016265016f72016e6f7401746f0162650001",
        "000001000000000000000001",
        "29c9fc69a197d038ccdd14e2ddfcaa0543332164",
        "412503524303ed3c6c5f283843af8c3e",
    ),
    AeadVector(
        "6c6567616c697a656d6172696a75616e61616e64646f69746265666f72656961",
        "7475726e333021696765746d",
        "45000030da3a00008001df3bc0a80005c0a800010800c6cd020007006162636465666768696a6b6c6d6e6f707172737401"
        "020201",
        "796b6963ffffffffffffffff",
        "f97ab2aa356d8edce17644ac8c78e25dd24dedbb29ebf1b64a274b39b49c3a864cd3d78ca4ae68a32b42458fb57dbe821d"
        "cc63b9",
        "d0937ba2945f669368661a329fb4c053",
    ),
]

# RFC 7634, appendix A
CHACHA = AeadVector(
    "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
    "a0a1a2a31011121314151617",
    "45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec100007362708090a0b0c0d0e0f10111213141516"
    "1718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363701020204",
    "0102030400000005",
    "24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb61aa95dfab4c02f72aa71e"
    "7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da9165b82829f641e0",
    "76aaa8266b7fb0f7b11b369907e1ad43",
)


AEAD = [
    *((transform, each) for transform in (Encr.AES_GCM_8, Encr.AES_GCM_12, Encr.AES_GCM_16) for each in GCM),
    (Encr.CHACHA20_POLY1305, CHACHA),
]


def _aead_id(value: Encr | AeadVector) -> str:
    return value.name if isinstance(value, Encr) else value.associated


@pytest.mark.parametrize(("transform", "vector"), AEAD, ids=_aead_id)
def test_aead(transform: Encr, vector: AeadVector) -> None:
    """The draft's tags have 16 bytes; 8 and 12 are what is left of them when they are cut."""
    nonce, associated = unhex(vector.nonce), unhex(vector.associated)
    cipher = make_cipher(transform, Key(unhex(vector.key) + nonce[:4]), Integ.NONE, Key())
    high = associated[4:-4]  # present with extended sequence numbers
    prefix = associated[:4] + associated[-4:] + nonce[4:]
    expected = prefix + unhex(vector.ciphertext) + unhex(vector.tag)[: transform.icv_length]
    assert cipher.seal(prefix, unhex(vector.plaintext), high) == expected
    assert cipher.open(expected, high) == unhex(vector.plaintext)
    assert cipher.open(expected[:-1] + bytes((expected[-1] ^ 1,)), high) is None


@pytest.mark.parametrize("provider", native_providers())
@pytest.mark.parametrize(("transform", "vector"), AEAD, ids=_aead_id)
def test_aead_in_c(provider: str, transform: Encr, vector: AeadVector) -> None:
    from natcompat.esp.datapath.compiled import ffi, lib

    nonce, associated = unhex(vector.nonce), unhex(vector.associated)
    path = ffi.gc(lib.esp_path_new(provider.encode()), lib.esp_path_release)
    key = ffi.from_buffer(unhex(vector.key) + nonce[:4])
    parameters = ffi.new("struct esp_parameters *")
    parameters.encryption, parameters.key, parameters.key_length = transform, key, len(key)
    prefix, plaintext = associated[:4] + associated[-4:] + nonce[4:], unhex(vector.plaintext)
    high = associated[4:-4] or ffi.NULL
    expected = prefix + unhex(vector.ciphertext) + unhex(vector.tag)[: transform.icv_length]

    def crypt(packet: bytes, *, sealing: bool) -> tuple[int, bytes]:
        buffer = bytearray(packet)
        done = lib.esp_crypt_once(path, parameters, ffi.from_buffer(buffer), len(plaintext), high, sealing)
        return done, bytes(buffer)

    assert crypt(prefix + plaintext + bytes(transform.icv_length), sealing=True) == (1, expected)
    assert crypt(expected, sealing=False) == (1, prefix + plaintext + expected[-transform.icv_length :])
    assert crypt(expected[:-1] + bytes((expected[-1] ^ 1,)), sealing=False)[0] == 0


def test_gmac() -> None:
    """The packet of draft-mcgrew-gcm-test-01 with ENCR_NULL_AUTH_AES_GMAC (RFC 4543)."""
    key = Key(unhex("4c80cdefbb5d10da906ac73c3613a634") + unhex("22433c64"))
    cipher = make_cipher(Encr.NULL_AUTH_AES_GMAC, key, Integ.NONE, Key())
    prefix = unhex("00004321 00000007 0000000000000000")
    payload = unhex(
        "45000030da3a00008001df3bc0a80005c0a800010800c6cd020007006162636465666768696a6b6c6d6e6f707172737401020201"
    )
    expected = prefix + payload + unhex("f2a9a836e155106aa8dcd618e4099aaa")
    assert cipher.seal(prefix, payload, b"") == expected
    assert cipher.open(expected, b"") == payload


class CbcVector(NamedTuple):
    case: str
    key: str
    packet: str
    """SPI, sequence number, IV and ciphertext; these packets have no integrity check value."""
    payload: str
    next_header: int


RFC3602 = [
    CbcVector(
        "transport mode ping",
        "90d382b410eeba7ad938c46cec1a82bf",
        "0000432100000001e96e8c08ab465763fd098d45dd3ff893f663c25d325c18c6a9453e194e120849a4870b66cc6b9965330013"
        "b4898dc856a4699e523a55db080b59ec3a8e4b7e52775b07d1db34ed9c538ab50c551b874aa269add047ad2d5913ac19b7cfba"
        "d4a6",
        "08000ebda70a00008e9c083db95b070008090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f2021222324252627"
        "28292a2b2c2d2e2f3031323334353637",
        1,
    ),
    CbcVector(
        "transport mode ping with a pattern",
        "90d382b410eeba7ad938c46cec1a82bf",
        "000043210000000869d08df7d203329db093fc4924e5bd80f51995881ec4e0c4488987ce742e8109689bb379d2d750c0d915"
        "dca346a89f75",
        "0800b5e8a80a0500a69c083d0b660e00777777777777777777777777",
        1,
    ),
    CbcVector(
        "tunnel mode ping",
        "0123456789abcdef0123456789abcdef",
        "0000876500000002f4e765244f6407adf13dc1380f673f37773b5241a4c449225e4f3ce5ed611b0c237ca96cf74a93013c1b"
        "0ea1a0cf70f8e4ecaec78ac53aad7a0f022b859243c647752e94a859352b8a4d4d2decd136e5c177f132ad3fbfb2201ac990"
        "4c74ee0a109e0ca1e4dfe9d5a100b842f1c22f0d",
        "45000054090400004001f988c0a87b03c0a87bc808009f76a90a0100b49c083d02a2040008090a0b0c0d0e0f1011121314"
        "15161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637",
        4,
    ),
    CbcVector(
        "tunnel mode ping with a pattern",
        "0123456789abcdef0123456789abcdef",
        "000087650000000585d47224b5f3dd5d2101d4ea8dffab2215b92683819596a8047232cc00f7048fe45318e11f8a0f62ede3"
        "c3fc61203bb50f980a08c9843fd3a1b06d5c07ff9639b7eb7dfb3512e5de435e7207ed971ef3d2726d9b5ef6affc6d17a0de"
        "cbb13892",
        "45000044090c00004001f990c0a87b03c0a87bc80800d63caa0a0200c69c083da3de0300ffffffffffffffffffffffffffff"
        "ffffffffffffffffffffffffffffffffffff",
        4,
    ),
]


@pytest.mark.parametrize("vector", RFC3602, ids=lambda vector: vector.case)
def test_cbc(vector: CbcVector) -> None:
    """The packets of RFC 3602, case 5 to 8, with the check value that HMAC-SHA2-256-128 puts behind them."""
    key, published, mac_key = unhex(vector.key), unhex(vector.packet), bytes(range(32))
    expected = published + hmac.digest(mac_key, published, "sha256")[:16]
    cipher = make_cipher(Encr.AES_CBC, Key(key), Integ.HMAC_SHA2_256_128, Key(mac_key))
    plaintext = cipher.open(expected, b"")
    assert plaintext is not None
    length = packet.payload_length(plaintext)
    assert (plaintext[:length], plaintext[-1]) == (unhex(vector.payload), vector.next_header)

    # The IV is a random block, encrypted; so what encrypts to the published IV makes the published packet.
    # (The object has sealed nothing yet, and the first block is chained to zeros.)
    block = Cipher(algorithms.AES(key), modes.ECB()).decryptor().update(published[8:24])
    padding = packet.trailers(vector.next_header)[-(length + 2) % 16]
    assert cipher.seal(published[:8] + block, unhex(vector.payload) + padding, b"") == expected


@pytest.mark.parametrize("provider", native_providers())
@pytest.mark.parametrize("vector", RFC3602[2:], ids=lambda vector: vector.case)
def test_cbc_in_c(provider: str, vector: CbcVector) -> None:
    """Those of tunnel mode, nine times in one burst, where they may be done at once."""
    from natcompat.esp.datapath.native import NativeDataPath

    published, mac_key = unhex(vector.packet), bytes(range(32))
    arrived = published + hmac.digest(mac_key, published, "sha256")[:16]
    arguments: dict[str, Any] = {
        "spi": int.from_bytes(published[:4]),
        "encryption": Encr.AES_CBC,
        "encryption_key": unhex(vector.key),
        "integrity": Integ.HMAC_SHA2_256_128,
        "integrity_key": mac_key,
    }
    with EspEngine(timer=False, datapath=partial(NativeDataPath, provider=provider)) as engine:
        engine.add_sa(sa(Direction.IN, **arguments))
        selector = TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0")
        engine.add_policy(policy(Direction.IN, selector=selector))
        first, *others = engine.open_burst([(arrived, (OUTER[4][1], 4500))] * 9)
    assert isinstance(first, Opened)
    assert first.inner == unhex(vector.payload)
    assert [isinstance(each, Dropped) and each.reason for each in others] == [Reason.REPLAYED] * 8


RFC3686 = [
    (
        "ae6852f8121067cc4bf7a5765577f39e",
        "00000030",
        "0000000000000000",
        b"Single block msg".hex(),
        "e4095d4fb7a7b3792d6175a3261311b8",
    ),
    (
        "7e24067817fae0d743d6ce1f32539163",
        "006cb6db",
        "c0543b59da48d90b",
        bytes(range(32)).hex(),
        "5104a106168a72d9790d41ee8edad388eb2e1efc46da57c8fce630df9141be28",
    ),
    (
        "7691be035e5020a8ac6e618529f9a0dc",
        "00e0017b",
        "27777f3f4a1786f0",
        bytes(range(36)).hex(),
        "c1cf48a89f2ffdd9cf4652e9efdb72d74540a42bde6d7836d59a5ceaaef3105325b2072f",
    ),
    (
        "16af5b145fc9f579c175f93e3bfb0eed863d06ccfdb78515",
        "00000048",
        "36733c147d6d93cb",
        b"Single block msg".hex(),
        "4b55384fe259c9c84e7935a003cbe928",
    ),
    (
        "7c5cb2401b3dc33c19e7340819e0f69c678c3db8e6f6a91a",
        "0096b03b",
        "020c6eadc2cb500d",
        bytes(range(32)).hex(),
        "453243fc609b23327edfaafa7131cd9f8490701c5ad4a79cfc1fe0ff42f4fb00",
    ),
    (
        "02bf391ee8ecb159b959617b0965279bf59b60a786d3e0fe",
        "0007bdfd",
        "5cbd60278dcc0912",
        bytes(range(36)).hex(),
        "96893fc55e5c722f540b7dd1ddf7e758d288bc95c69165884536c811662f2188abee0935",
    ),
    (
        "776beff2851db06f4c8a0542c8696f6c6a81af1eec96b4d37fc1d689e6c1c104",
        "00000060",
        "db5672c97aa8f0b2",
        b"Single block msg".hex(),
        "145ad01dbf824ec7560863dc71e3e0c0",
    ),
    (
        "f6d66d6bd52d59bb0796365879eff886c66dd51a5b6a99744b50590c87a23884",
        "00faac24",
        "c1585ef15a43d875",
        bytes(range(32)).hex(),
        "f05e231b3894612c49ee000b804eb2a9b8306b508f839d6a5530831d9344af1c",
    ),
    (
        "ff7a617ce69148e4f1726e2f43581de2aa62d9f805532edff1eed687fb54153d",
        "001cc5b7",
        "51a51d70a1c11148",
        bytes(range(36)).hex(),
        "eb6c52821d0bbbf7ce7594462aca4faab407df866569fd07f48cc0b583d6071f1ec0e6b8",
    ),
]


@pytest.mark.parametrize("high", [b"", b"\0\0\0\x05"], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize(
    ("key", "nonce", "iv", "plaintext", "ciphertext"), RFC3686, ids=map(str, range(1, 10))
)
def test_ctr(key: str, nonce: str, iv: str, plaintext: str, ciphertext: str, high: bytes) -> None:
    """The vectors of RFC 3686, section 6, inside an ESP packet."""
    mac_key = bytes(range(64))
    cipher = make_cipher(Encr.AES_CTR, Key(unhex(key) + unhex(nonce)), Integ.HMAC_SHA2_512_256, Key(mac_key))
    prefix = bytes.fromhex("c0de0001 00000001") + unhex(iv)
    covered = prefix + unhex(ciphertext)
    expected = covered + hmac.new(mac_key, covered + high, hashlib.sha512).digest()[:32]
    for _ in range(2):  # one object, packet after packet
        assert cipher.seal(prefix, unhex(plaintext), high) == expected
        assert cipher.open(expected, high) == unhex(plaintext)
