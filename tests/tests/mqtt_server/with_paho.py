"""Does with paho-mqtt what a client of MQTT 3.1.1 can do; ends with an error at the first thing that is wrong."""

import queue
import sys

import paho.mqtt.client as mqtt

PORT = int(sys.argv[1])
TIME = 30


class Client:
    def __init__(self, name, will=None, clean=True):
        arguments = {"client_id": name, "clean_session": clean, "protocol": mqtt.MQTTv311}
        if hasattr(mqtt, "CallbackAPIVersion"):
            arguments["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION1
        self.client = mqtt.Client(**arguments)
        self.client.max_queued_messages_set(0)
        self.heard, self.events = queue.Queue(), queue.Queue()
        self.client.on_message = lambda _client, _data, message: self.heard.put(message)
        self.client.on_connect = lambda _client, _data, flags, code: self.events.put((flags["session present"], code))
        self.client.on_subscribe = lambda _client, _data, _id, granted: self.events.put(tuple(granted))
        self.client.on_unsubscribe = lambda _client, _data, _id: self.events.put("unsubscribed")
        if will:
            self.client.will_set(will, "gone", qos=1, retain=True)
        self.client.connect("127.0.0.1", PORT, keepalive=5)
        self.client.loop_start()
        assert self.events.get(timeout=TIME) == (0, 0), "connects, with a new session"

    def subscribe(self, *filters):
        self.client.subscribe(list(filters))
        return self.events.get(timeout=TIME)

    def unsubscribe(self, topic):
        self.client.unsubscribe(topic)
        assert self.events.get(timeout=TIME) == "unsubscribed"

    def publish(self, topic, payload, qos, retain=False):
        self.client.publish(topic, payload, qos, retain).wait_for_publish()

    def hear(self):
        message = self.heard.get(timeout=TIME)
        return message.topic, message.payload.decode(), message.qos, message.retain

    def leave(self):
        self.client.disconnect()
        self.client.loop_stop()

    def die(self):
        self.client.loop_stop()
        self.client.socket().close()


def main():
    hearer, sayer = Client("hearer"), Client("sayer", clean=False)
    assert hearer.subscribe(("a/+", 0), ("b/+", 1), ("c/+", 2)) == (0, 1, 1), "2 is granted as 1"
    for topic, best in (("a/x", 0), ("b/x", 1), ("c/x", 1)):
        for qos in (0, 1, 2):
            sayer.publish(topic, "ü", qos)
            assert hearer.hear() == (topic, "ü", min(qos, best), False)

    for qos in (0, 1, 2):
        for number in range(1000):
            sayer.client.publish("b/many", str(number), qos)
        assert [hearer.hear()[1] for _ in range(1000)] == [str(number) for number in range(1000)], qos

    hearer.unsubscribe("a/+")
    hearer.unsubscribe("never/had")
    sayer.publish("a/x", "no", 0)
    sayer.publish("b/x", "yes", 0)
    assert hearer.hear()[1] == "yes"

    for number in range(10_000):
        sayer.client.publish(f"kept/{number}", "1", 1, True)
    sayer.publish("kept/end", "1", 1, True)
    for qos in (0, 1):
        late = Client(f"late-{qos}")
        late.subscribe(("kept/+", qos))
        found = [late.hear() for _ in range(10_001)]
        assert all(message[2:] == (qos, True) for message in found)
        assert len({message[0] for message in found}) == 10_001
        late.leave()
    sayer.publish("kept/7", "", 1, True)
    hearer.subscribe(("kept/7", 1), ("kept/8", 1))
    assert hearer.hear() == ("kept/8", "1", 1, True)

    hearer.subscribe(("will/+", 1))
    Client("polite", will="will/polite").leave()
    Client("mortal", will="will/mortal").die()
    heard = hearer.hear()
    assert heard == ("will/mortal", "gone", 1, False), heard
    again = Client("again")
    again.subscribe(("will/+", 0))
    heard = again.hear()
    assert heard == ("will/mortal", "gone", 0, True), heard

    first = Client("twice", will="will/first")
    Client("twice")
    assert hearer.hear()[0] == "will/first"
    first.leave()
    for client in (hearer, sayer, again):
        client.leave()
    print("all is well")


main()
