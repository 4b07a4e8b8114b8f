"""Everyday tools with requests in natural words: the weather, a timer, an email …"""

from __future__ import annotations

from random import Random

from workstation.demo.tasks.base import Split, held_out, pick
from workstation.demo.tasks.lexicon import city, clock, code, name, word
from workstation.demo.tasks.tool_pool import CITY, Tool, email, enum, number, phrase, text

_WHERE = text("location", "City or place", city)
EVERYDAY: tuple[Tool, ...] = (
    Tool(
        "get_weather",
        "Get the current weather in a city",
        (CITY,),
        (
            "what is the weather in {city}",
            "how is the weather in {city}",
            "what is the weather like in {city}",
            "tell me the weather in {city}",
            "will it rain in {city}",
            "weather in {city}",
            "what's the weather in {city}",
            "get the weather for {city}",
            "is it cold in {city}",
            "how warm is it in {city}",
            "what is the weather today in {city}",
            "what's the weather like in {city}",
            "show me the weather in {city}",
        ),
    ),
    Tool(
        "get_weather",
        "Get the weather",
        (_WHERE, enum("unit", "Unit of the temperature", "celsius", "fahrenheit")),
        (
            "what is the weather in {location}",
            "what is the weather in {location} in {unit}",
            "how warm is it in {location} in {unit}",
            "tell me the weather in {location} in {unit}",
            "what's the weather like in {location}",
            "get the weather for {location}",
        ),
    ),
    Tool(
        "get_current_weather",
        "Get the current weather in a given location",
        (_WHERE, enum("unit", "Unit", "celsius", "fahrenheit")),
        (
            "what is the weather in {location}",
            "what is the current weather in {location} in {unit}",
            "what's the weather in {location} today",
            "how is the weather in {location} right now",
        ),
    ),
    Tool(
        "get_time",
        "Get the current time in a city",
        (CITY,),
        (
            "what time is it in {city}",
            "tell me the time in {city}",
            "what is the time in {city}",
            "current time in {city}",
            "what is the current time in {city}",
            "tell me what time it is in {city}",
        ),
    ),
    Tool(
        "send_email",
        "Send an email",
        (text("to", "Receiver", email), text("subject", "Subject line", phrase)),
        (
            'send an email to {to} with the subject "{subject}"',
            'email {to} about "{subject}"',
            'write an email to {to}, subject "{subject}"',
            'send an email about "{subject}" to {to}',
            'mail {to} with the subject "{subject}"',
            'send {to} an email with the subject "{subject}"',
        ),
    ),
    Tool(
        "send_message",
        "Send a message to a person",
        (text("to", "Receiver", name), text("text", "Message text", phrase)),
        (
            'send {to} the message "{text}"',
            'tell {to} "{text}"',
            'message {to} "{text}"',
            'write "{text}" to {to}',
            'send "{text}" to {to}',
            'say "{text}" to {to}',
            'tell "{text}" to {to}',
            'text {to} "{text}"',
            'send a message to {to}: "{text}"',
        ),
    ),
    Tool(
        "set_timer",
        "Start a timer",
        (number("minutes", "Length in minutes", 1, 180),),
        (
            "set a timer for {minutes} minutes",
            "start a timer of {minutes} minutes",
            "wake me in {minutes} minutes",
            "timer for {minutes} minutes",
            "start a timer for {minutes} minutes",
            "set a timer of {minutes} minutes",
        ),
    ),
    Tool(
        "set_alarm",
        "Set an alarm clock",
        (text("time", "Time as HH:MM", lambda rng, _split: clock(rng)),),
        (
            "set an alarm for {time}",
            "wake me up at {time}",
            "alarm at {time}",
            "wake me at {time}",
            "set an alarm at {time}",
            "set the alarm to {time}",
        ),
    ),
    Tool(
        "search",
        "Search the web",
        (text("query", "What to look for", phrase),),
        (
            'search for "{query}"',
            'look up "{query}"',
            'search the web for "{query}"',
            'find pages about "{query}"',
            'search "{query}"',
            'look for "{query}"',
            'search the web for pages about "{query}"',
        ),
    ),
    Tool(
        "web_search",
        "Search the internet",
        (text("query", "Search words", phrase), number("limit", "Number of results", 1, 50)),
        (
            'search the internet for "{query}" and show {limit} results',
            'find {limit} pages about "{query}"',
            'look up "{query}" on the internet',
        ),
    ),
    Tool(
        "calculator",
        "Work out an operation on two numbers",
        (number("a", "First number", 0, 9999), number("b", "Second number", 0, 9999)),
        (
            "use the calculator on {a} and {b}",
            "give {a} and {b} to the calculator",
            "call the calculator with {a} and {b}",
            "run the calculator with {a} and {b}",
            "use the calculator with {a} and {b}",
            "call the calculator on {a} and {b}",
            "pass {a} and {b} to the calculator",
        ),
    ),
    Tool(
        "add",
        "Add two numbers",
        (number("a", "First number", 0, 99999), number("b", "Second number", 0, 99999)),
        (
            "add {a} and {b}",
            "what is {a} plus {b}",
            "use the tool to add {a} and {b}",
            "what is {a} + {b}",
            "compute {a} + {b}",
            "sum {a} and {b}",
            "how much is {a} + {b}",
            "how much is {a} plus {b}",
            "calculate {a} plus {b}",
        ),
    ),
    Tool(
        "multiply",
        "Multiply two numbers",
        (number("a", "First number", 0, 9999), number("b", "Second number", 0, 9999)),
        (
            "multiply {a} by {b}",
            "what is {a} times {b}",
            "multiply {a} and {b}",
            "what is {a} * {b}",
            "compute {a} * {b}",
            "how much is {a} * {b}",
            "how much is {a} times {b}",
            "calculate {a} times {b}",
        ),
    ),
    Tool(
        "play_song",
        "Play a song",
        (text("title", "Title of the song", phrase),),
        (
            'play the song "{title}"',
            'play "{title}"',
            'I want to hear "{title}"',
            'I want to hear the song "{title}"',
            'please play "{title}" for me',
        ),
    ),
    Tool(
        "turn_on_light",
        "Turn on the light in a room",
        (enum("room", "The room", "kitchen", "bathroom", "bedroom", "office", "garage"),),
        (
            "turn on the light in the {room}",
            "switch the {room} light on",
            "light on in the {room}",
            "turn the {room} light on",
            "switch on the light in the {room}",
        ),
    ),
    Tool(
        "set_temperature",
        "Set the heating of a room",
        (number("degrees", "Degrees Celsius", 10, 30),),
        (
            "set the temperature to {degrees} degrees",
            "make it {degrees} degrees",
            "heat to {degrees} degrees",
            "heat the room to {degrees} degrees",
            "set the heating to {degrees} degrees",
        ),
    ),
    Tool(
        "convert_currency",
        "Convert money into another currency",
        (number("amount", "How much", 1, 9999), enum("currency", "Target currency", "EUR", "USD", "GBP", "JPY", "CHF")),
        (
            "convert {amount} into {currency}",
            "how much is {amount} in {currency}",
            "change {amount} to {currency}",
            "convert {amount} to {currency}",
            "change {amount} into {currency}",
        ),
    ),
    Tool(
        "get_stock_price",
        "Get the price of a share",
        (text("symbol", "Ticker symbol", lambda rng, split: code(rng, split)[:2]),),
        (
            "what is the share price of {symbol}",
            "get the stock price of {symbol}",
            "how much is a share of {symbol}",
            "get the price of {symbol}",
            "what is the stock price of {symbol}",
        ),
    ),
    Tool(
        "book_flight",
        "Book a flight",
        (text("origin", "City of departure", city), text("destination", "City of arrival", city)),
        (
            "book a flight from {origin} to {destination}",
            "I want to fly from {origin} to {destination}",
            "find me a flight from {origin} to {destination}",
        ),
    ),
    Tool(
        "read_file",
        "Read a file",
        (text("path", "Path of the file", lambda rng, split: f"{word(rng, split, 0.2)}.txt"),),
        (
            "read the file {path}",
            "open {path}",
            "show me {path}",
            "what is in {path}",
            "show the file {path}",
            "open the file {path}",
            "read {path}",
        ),
    ),
)


def everyday_tool(rng: Random, split: Split) -> Tool:
    """One of the everyday tools, asked for in words of the wanted side: a request's wording is held out per tool."""
    tool = pick(rng, EVERYDAY)
    spoken = [request for request in tool.requests if held_out(f"ask:{tool.name}:{request}") == (split == "held_out")]
    return Tool(tool.name, tool.about, tool.parameters, tuple(spoken)) if spoken else everyday_tool(rng, split)
